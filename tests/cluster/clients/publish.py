"""Publishes numbers with QoS 1 and with QoS 2 until its input ends, whenever its node goes away; paho comes back by itself."""

import os
import sys
import threading

import paho.mqtt.client as mqtt

client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id="paho", clean_session=False)
client.reconnect_delay_set(1, 1)
client.connect(os.environ["BROKER_HOST"], int(os.environ["BROKER_PORT"]))
client.loop_start()
print("publishing")

ended = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
count = 0
while not ended.is_set():
    for sent in [client.publish(f"clients/{qos}", str(count), qos) for qos in (1, 2)]:
        sent.wait_for_publish()
    count += 1
client.disconnect()
client.loop_stop()
print(count)
