// sub.js of a tutorial on offline messages with Mosca and MQTT.js, with its change for offline
// messages (clean: false). CLIENT_ID is cli_sub or cli2_sub there.
let mqtt = require('mqtt')

let client = mqtt.connect('mqtt://localhost', {
  port: process.env.BROKER_PORT,
  clientId: process.env.CLIENT_ID,
  clean: false//增加了此项
})

client.subscribe('test',{qos:1})

client.on('message', function (topic, message) {
  console.log('received message: ', message.toString())
})
