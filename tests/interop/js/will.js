// A will is published when the connection is lost, and not after DISCONNECT.
'use strict'

const assert = require('assert')
const { connect, drop, end, payloads, publish, received, run, subscribe } = require('./harness')

run(async () => {
  const watcher = await connect()
  await subscribe(watcher, 'status/+', { qos: 1 })
  const withWill = (name) => ({
    clientId: name,
    will: { topic: `status/${name}`, payload: `${name} is gone`, qos: 1, retain: true },
  })

  await end(await connect(withWill('polite')))
  await drop(await connect(withWill('dying')))
  await received(watcher, 1)
  await publish(watcher, 'status/end', 'end', { qos: 1 })
  assert.deepStrictEqual(payloads(await received(watcher, 2)), ['dying is gone', 'end'])

  const late = await connect()
  await subscribe(late, 'status/+', { qos: 1 })
  const [will] = await received(late, 1)
  assert.deepStrictEqual([will.payload, will.packet.retain], ['dying is gone', true])
  await end(late)
  await end(watcher)
})
