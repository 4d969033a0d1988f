// MQTT.js 0.3: createClient(port, host), MQTT 3.1. It takes a CONNACK whose reserved byte is not
// zero for a failure, so no session-present may be sent to a 3.1 client.
'use strict'

const assert = require('assert')
const mqtt = require('mqtt')

const connect = (options) => mqtt.createClient(Number(process.env.BROKER_PORT), process.env.BROKER_HOST, options)

const publisher = connect()
const session = { clientId: 'client-b', clean: false }
const first = connect(session)
first.subscribe('chat', { qos: 1 }, () => {
  first.end()
  first.stream.on('close', () => {
    for (let i = 0; i < 4; i++) {
      publisher.publish('chat', `message ${i}`, { qos: 1 }, i === 3 ? resume : undefined)
    }
  })
})

function resume() {
  const received = []
  const second = connect(session)
  second.on('message', (topic, message) => {
    received.push(message)
    if (received.length === 4) {
      assert.deepStrictEqual(received, [0, 1, 2, 3].map((i) => `message ${i}`))
      second.end()
      publisher.end()
    }
  })
}
