"""A session that was away gets everything, exactly once and in order, with QoS 1 and 2."""

import paho.mqtt.client as mqtt
from harness import VERSION, Client

publisher = Client()
for qos in (1, 2):
    client_id = f"sleeper-{qos}"
    first = Client(client_id, clean=False)
    assert not first.session_present
    assert first.subscribe(f"queue/{qos}", qos) == qos
    first.disconnect()

    numbers = [str(number) for number in range(300)]
    publisher.publish_all(f"queue/{qos}", numbers, qos)

    second = Client(client_id, clean=False)
    # MQTT 3.1 has no session-present.
    assert second.session_present == (VERSION != mqtt.MQTTv31)
    assert second.payloads(300) == numbers
    publisher.publish(f"queue/{qos}", "live", qos)
    assert second.payloads(1) == ["live"]
    second.disconnect()

    third = Client(client_id, clean=False)
    publisher.publish(f"queue/{qos}", "only this", qos)
    assert third.payloads(1) == ["only this"]
    third.disconnect()
publisher.disconnect()
