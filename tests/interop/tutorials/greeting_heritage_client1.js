// client1.js of "Getting started with MQTT" (thejackalofjavascript.com), with createClient as in
// the original, for MQTT.js 0.3.
var mqtt = require('mqtt')
var client  = mqtt.createClient(process.env.BROKER_PORT, 'localhost')
client.on('connect', function () {
  client.subscribe('presence')
  client.publish('presence', 'Client 1 is alive.. Test Ping! ' + Date())
  console.log('Client publishing..')
  client.end()
})
