"""A retained will is published when the connection is lost, and not after DISCONNECT."""

from harness import Client

watcher = Client()
watcher.subscribe("status/+", 1)

polite = Client("polite", will=("status/polite", "polite is gone", 1, True))
polite.disconnect()
dying = Client("dying", will=("status/dying", "dying is gone", 1, True))
dying.drop()

will = watcher.message()
assert (will.topic, will.payload, will.retain) == ("status/dying", b"dying is gone", False), will
late = Client()
late.subscribe("status/+", 1)
will = late.message()
assert (will.topic, will.payload, will.retain) == ("status/dying", b"dying is gone", True), will
late.disconnect()
watcher.disconnect()
