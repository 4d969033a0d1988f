"""Publishes numbers with QoS 1 and with QoS 2 until its input ends, whenever its node goes away; paho comes back by itself."""

import os
import queue
import sys
import threading

import paho.mqtt.client as mqtt

client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id="paho", clean_session=False)
client.reconnect_delay_set(1, 1)
acknowledged = queue.SimpleQueue()
client.on_publish = lambda _client, _data, packet_id, _reason, _properties: acknowledged.put(packet_id)
client.connect(os.environ["BROKER_HOST"], int(os.environ["BROKER_PORT"]))
client.loop_start()
print("publishing")

ended = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
count = 0
while not ended.is_set():
    # What is published while there is no connection goes out with the next one; waiting for it would be an error.
    waiting = {client.publish(f"clients/{qos}", str(count), qos).mid for qos in (1, 2)}
    while waiting:
        waiting.discard(acknowledged.get())
    count += 1
client.disconnect()
client.loop_stop()
print(count)
