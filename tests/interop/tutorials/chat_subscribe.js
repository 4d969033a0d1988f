// client-b of an introduction to MQTT.js and Mosca whose author got his offline messages in the
// order 1, 3, 2, 0. Only the first lines of his programs are handed down; this follows his text:
// QoS 1, clean: false, keep alive of 10 s. It subscribes and leaves with end(), or, when
// LEAVE_WITHOUT_END is set, without.
var mqtt = require('mqtt');

var client = mqtt.connect(process.env.BROKER_URL, {
  clientId: 'client-b',
  clean: false,
  keepalive: 10
});

client.subscribe('chat', { qos: 1 }, function () {
  console.log('subscribe ok.');
  if (process.env.LEAVE_WITHOUT_END) {
    process.exit();
  }
  client.end();
});
