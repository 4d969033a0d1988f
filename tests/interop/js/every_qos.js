// Every QoS in both directions, and the granted QoS of several filters in one SUBSCRIBE.
'use strict'

const assert = require('assert')
const { connect, end, publish, received, run, subscribe } = require('./harness')

run(async () => {
  const subscriber = await connect()
  const publisher = await connect()
  const granted = await subscribe(subscriber, {
    'granted/0': { qos: 0 },
    'granted/1': { qos: 1 },
    'granted/2': { qos: 2 },
  })

  assert.deepStrictEqual(
    granted.map(({ topic, qos }) => [topic, qos]),
    [
      ['granted/0', 0],
      ['granted/1', 1],
      ['granted/2', 2],
    ],
  )
  for (const grantedQos of [0, 1, 2]) {
    for (const qos of [0, 1, 2]) {
      await publish(publisher, `granted/${grantedQos}`, `published with ${qos}`, { qos })
    }
    const messages = await received(subscriber, 3)
    assert.deepStrictEqual(
      messages.map(({ payload, packet }) => [payload, packet.qos, packet.retain, packet.dup]),
      [0, 1, 2].map((qos) => [`published with ${qos}`, Math.min(qos, grantedQos), false, false]),
    )
    subscriber.received.length = 0
  }
  await end(publisher)
  await end(subscriber)
})
