// A client that reconnects after one millisecond, over and over with the same client identifier,
// keeps its session and its queue.
'use strict'

const assert = require('assert')
const { once } = require('events')
const { connect, end, numbers, payloads, publish, received, run, subscribe } = require('./harness')

run(async () => {
  const stormy = await connect({ clientId: 'stormy', clean: false, reconnectPeriod: 1 })
  const publisher = await connect()
  await subscribe(stormy, 'storm', { qos: 1 })

  for (const number of numbers(0, 200)) {
    stormy.stream.destroy()
    const reconnected = once(stormy, 'connect')
    await publish(publisher, 'storm', number, { qos: 1 })
    await reconnected
  }

  // An acknowledgement that was lost with its connection makes a message come again.
  const distinct = () => [...new Set(payloads(stormy.received))]
  while (distinct().length < 200) {
    await received(stormy, stormy.received.length + 1)
  }
  assert.deepStrictEqual(distinct(), numbers(0, 200))
  await end(stormy)
  await end(publisher)
})
