// client-b of an introduction to MQTT.js and Mosca, back again: it does not subscribe anew.
var mqtt = require('mqtt');

var client = mqtt.connect(process.env.BROKER_URL, {
  clientId: 'client-b',
  clean: false,
  keepalive: 10
});

client.on('message', function (topic, message) {
  console.log('message: ' + message.toString());
});
