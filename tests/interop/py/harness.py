"""What the scripts share: paho clients of either major version, that wait for what they expect."""

import os
import queue
import socket

import paho.mqtt.client as mqtt
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

DEADLINE = 60  # seconds; bounds a hang
PORT = int(os.environ["BROKER_PORT"])
VERSION = int(os.environ["PROTOCOL_VERSION"])
TRANSPORT = {"tcp": "tcp", "ws": "websockets"}[os.environ["TRANSPORT"]]


class Client:
    """A connected client with its own network thread."""

    def __init__(self, client_id="", clean=True, will=None):
        self._events = queue.Queue()
        self._messages = queue.Queue()
        arguments = {"client_id": client_id, "protocol": VERSION, "transport": TRANSPORT}
        if VERSION != mqtt.MQTTv5:
            # An empty identifier is for clean sessions of 3.1.1 and later; paho makes one for 3.1.
            arguments["clean_session"] = clean
        if hasattr(mqtt, "CallbackAPIVersion"):
            self._paho = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, **arguments)
        else:
            self._paho = mqtt.Client(**arguments)
        # The first arguments are the same in all versions of the callbacks.
        self._paho.on_connect = lambda _c, _u, flags, reason, *_: self._events.put(("connect", flags, reason))
        self._paho.on_subscribe = lambda _c, _u, mid, codes, *_: self._events.put(("subscribe", mid, codes))
        self._paho.on_disconnect = lambda *_: self._events.put(("disconnect",))
        self._paho.on_message = lambda _c, _u, message: self._messages.put(message)
        if will:
            self._paho.will_set(*will)

        options = {}
        if VERSION == mqtt.MQTTv5:
            properties = Properties(PacketTypes.CONNECT)
            properties.SessionExpiryInterval = 0 if clean else 3600
            options = {"clean_start": clean, "properties": properties}
        self._paho.connect("127.0.0.1", PORT, keepalive=60, **options)
        self._paho.loop_start()
        _, flags, reason = self._expect("connect")
        assert reason == 0, reason
        self.session_present = bool(
            flags["session present"] if isinstance(flags, dict) else flags.session_present
        )

    def subscribe(self, topic_filter, qos):
        """Waits for SUBACK and returns the code in it."""
        self._paho.subscribe(topic_filter, qos)
        _, _, codes = self._expect("subscribe")
        return getattr(codes[0], "value", codes[0])

    def publish(self, topic, payload, qos=0, retain=False, properties=None):
        """Waits for the end of the QoS handshake."""
        options = {"properties": properties} if properties else {}
        info = self._paho.publish(topic, payload, qos, retain, **options)
        info.wait_for_publish(DEADLINE)
        assert info.is_published()

    def publish_all(self, topic, payloads, qos):
        """Publishes without waiting in between."""
        for info in [self._paho.publish(topic, payload, qos) for payload in payloads]:
            info.wait_for_publish(DEADLINE)
            assert info.is_published()

    def message(self):
        return self._messages.get(timeout=DEADLINE)

    def payloads(self, count):
        return [self.message().payload.decode() for _ in range(count)]

    def disconnect(self):
        # The network thread acknowledges a message after it has handed it on. By the answer to a
        # later request it has.
        self.subscribe("unused", 0)
        self._paho.disconnect()
        self._expect("disconnect")
        self._paho.loop_stop()

    def drop(self):
        """Ends the connection without DISCONNECT."""
        self._paho.reconnect_delay_set(3600, 3600)
        connection = self._paho.socket()
        # A WebSocket is paho's wrapper around the socket.
        getattr(connection, "_socket", connection).shutdown(socket.SHUT_RDWR)
        self._expect("disconnect")

    def _expect(self, kind):
        event = self._events.get(timeout=DEADLINE)
        assert event[0] == kind, event
        return event
