// A second connection with the same client identifier takes the session over.
'use strict'

const assert = require('assert')
const { once } = require('events')
const { connect, end, payloads, protocolVersion, publish, received, run, subscribe } = require('./harness')

run(async () => {
  const publisher = await connect()
  const old = await connect({ clientId: 'twin', clean: false })
  await subscribe(old, 'post', { qos: 1 })
  const closed = once(old, 'close')
  let reason
  old.on('disconnect', (packet) => {
    reason = packet.reasonCode
  })

  const taker = await connect({ clientId: 'twin', clean: false })
  await closed
  // Only MQTT 5 has a DISCONNECT from the broker; it is "Session taken over", [MQTT-3.1.4-3].
  assert.strictEqual(reason, protocolVersion === 5 ? 0x8e : undefined)
  await publish(publisher, 'post', 'hello', { qos: 1 })

  assert.deepStrictEqual(payloads(await received(taker, 1)), ['hello'])
  assert.deepStrictEqual(old.received, [])
  await end(taker)
  await end(publisher)
})
