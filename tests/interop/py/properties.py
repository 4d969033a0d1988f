"""MQTT 5 properties arrive as they were sent, user properties in order."""

from harness import Client
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

subscriber = Client()
publisher = Client()
subscriber.subscribe("request", 1)

sent = Properties(PacketTypes.PUBLISH)
sent.UserProperty = [("b", "2"), ("a", "1"), ("b", "2")]
sent.ResponseTopic = "answers/7"
sent.CorrelationData = bytes([0, 255, 7])
sent.ContentType = "text/plain"
sent.MessageExpiryInterval = 3600
sent.PayloadFormatIndicator = 1
publisher.publish("request", "ping", 1, properties=sent)

received = subscriber.message().properties
assert received.UserProperty == sent.UserProperty, received
assert received.ResponseTopic == "answers/7", received
assert received.CorrelationData == bytes([0, 255, 7]), received
assert received.ContentType == "text/plain", received
assert received.MessageExpiryInterval == 3600, received
assert received.PayloadFormatIndicator == 1, received
publisher.disconnect()
subscriber.disconnect()
