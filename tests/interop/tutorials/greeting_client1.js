// client1.js of "Getting started with MQTT" (thejackalofjavascript.com), with mqtt.connect instead
// of createClient as in its Chinese translation.
var mqtt = require('mqtt')
// client = mqtt.createClient(1883,'localhost');
var client  = mqtt.connect(process.env.BROKER_URL)
client.on('connect', function () {
  client.subscribe('presence')
  client.publish('presence', 'Client 1 is alive.. Test Ping! ' + Date())
  console.log('Client publishing..')
  client.end()
})
