// QoS 2 across lost connections on both sides: every message arrives, and none twice.
'use strict'

const assert = require('assert')
const { connect, drop, end, numbers, payloads, publish, received, run, start, subscribe } = require('./harness')
const { once } = require('events')

run(async () => {
  const subscriber = await connect({ clientId: 'receiver', clean: false, reconnectPeriod: 1 })
  await subscribe(subscriber, 'billing', { qos: 2 })
  const publisher = start({ clientId: 'sender', clean: false, reconnectPeriod: 1 })
  await once(publisher, 'connect')

  const published = []
  for (const number of numbers(0, 200)) {
    published.push(publish(publisher, 'billing', number, { qos: 2 }))
    if (published.length === 10) {
      // MQTT.js does not heed Receive Maximum, which a broker may enforce.
      await Promise.all(published.splice(0))
    }
    if (number === '55' || number === '155') {
      publisher.stream.destroy()
      await once(publisher, 'connect')
    }
    if (number === '105') {
      subscriber.stream.destroy()
      await once(subscriber, 'connect')
    }
  }
  await Promise.all(published)
  await publish(publisher, 'billing', 'end', { qos: 2 })
  while (!payloads(subscriber.received).includes('end')) {
    await received(subscriber, subscriber.received.length + 1)
  }

  const arrived = payloads(subscriber.received).slice(0, -1).map(Number)
  assert.deepStrictEqual([...arrived].sort((a, b) => a - b), numbers(0, 200).map(Number))
  await end(publisher)
  await drop(subscriber)
})
