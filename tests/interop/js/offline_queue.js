// A session that was away gets everything, in order, also what is published while it catches up;
// nothing comes twice to a client that acknowledged.
'use strict'

const assert = require('assert')
const { connect, drop, end, numbers, payloads, publish, received, run, subscribe } = require('./harness')

run(async () => {
  const sleeper = { clientId: 'sleeper', clean: false }
  const first = await connect(sleeper)
  assert.strictEqual(first.connack.sessionPresent, false)
  await subscribe(first, 'queue', { qos: 1 })
  await end(first)

  const publisher = await connect()
  const publishAll = (from, to) =>
    Promise.all(numbers(from, to).map((number) => publish(publisher, 'queue', number, { qos: 1 })))
  await publishAll(0, 500)

  const second = await connect(sleeper)
  await publishAll(500, 600)
  assert.strictEqual(second.connack.sessionPresent, Number(process.env.PROTOCOL_VERSION) !== 3)
  assert.deepStrictEqual(payloads(await received(second, 600)), numbers(0, 600))

  // The last acknowledgements are on their way when the connection is lost: what comes again
  // after it may only be the end of the queue, and then the new message.
  await drop(second)
  await publishAll(600, 601)
  const third = await connect(sleeper)
  while (third.received.length === 0 || third.received[third.received.length - 1].payload !== '600') {
    await received(third, third.received.length + 1)
  }
  const again = payloads(third.received)
  assert.deepStrictEqual(again, numbers(601 - again.length, 601))
  await end(third)
  await end(publisher)
})
