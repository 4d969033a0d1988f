"""Every QoS in both directions: granted, delivered, and limited by the subscription."""

from harness import Client

subscriber = Client()
publisher = Client()
for granted in (0, 1, 2):
    topic = f"granted/{granted}"
    assert subscriber.subscribe(topic, granted) == granted
    for qos in (0, 1, 2):
        publisher.publish(topic, f"published with {qos}", qos)
        message = subscriber.message()
        assert message.topic == topic
        assert message.payload == f"published with {qos}".encode()
        assert (message.qos, message.retain, message.dup) == (min(qos, granted), False, False)

numbers = [str(number) for number in range(300)]
publisher.publish_all("granted/2", numbers, 2)
assert subscriber.payloads(300) == numbers
publisher.disconnect()
subscriber.disconnect()
