// Receives everything in a session that lasts, whenever its node goes away; MQTT.js comes back by itself.
'use strict'

const mqtt = require('mqtt')

const client = mqtt.connect(process.env.BROKER_URL, {
  clientId: 'mqtt-js',
  protocolVersion: 5,
  clean: false,
  properties: { sessionExpiryInterval: 3600 },
  reconnectPeriod: 100,
})

client.once('connect', () => {
  client.subscribe('clients/#', { qos: 2 }, (error) => {
    if (error) throw error
    console.log('subscribed')
  })
})
client.on('message', (topic, payload) => console.log(`${topic} ${payload}`))
