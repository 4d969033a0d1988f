// MQTT.js subscribes again after each reconnect; that makes no second copy of a message.
'use strict'

const assert = require('assert')
const { once } = require('events')
const { connect, end, payloads, publish, received, run, subscribe } = require('./harness')

run(async () => {
  const publisher = await connect()
  for (const clean of [true, false]) {
    const subscriber = await connect({ clientId: `clean ${clean}`, clean, reconnectPeriod: 1 })
    await subscribe(subscriber, 'news/+', { qos: 1 })
    await subscribe(subscriber, 'news/+', { qos: 1 })

    subscriber.stream.destroy()
    await once(subscriber, 'connect')
    // This SUBACK comes after that of the automatic SUBSCRIBE.
    await subscribe(subscriber, 'unused')

    await publish(publisher, 'news/today', 'one', { qos: 1 })
    await publish(publisher, 'news/today', 'two', { qos: 1 })
    assert.deepStrictEqual(payloads(await received(subscriber, 2)), ['one', 'two'])
    await end(subscriber)
  }
  await end(publisher)
})
