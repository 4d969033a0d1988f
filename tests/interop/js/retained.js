// The last retained JSON document of each topic, for subscribers that come late.
'use strict'

const assert = require('assert')
const { connect, end, publish, received, run, subscribe } = require('./harness')

run(async () => {
  const publisher = await connect()
  const retain = (topic, payload) => publish(publisher, topic, payload, { qos: 1, retain: true })
  await retain('house/kitchen', JSON.stringify({ celsius: 20 }))
  await retain('house/kitchen', JSON.stringify({ celsius: 21, note: 'später' }))
  await retain('house/attic', JSON.stringify({ celsius: 9 }))
  await retain('house/removed', 'x')
  await retain('house/removed', '')

  const late = await connect()
  await subscribe(late, 'house/#', { qos: 1 })
  const messages = (await received(late, 2)).map(({ topic, payload, packet }) => [
    topic,
    JSON.parse(payload),
    packet.retain,
  ])
  messages.sort()
  assert.deepStrictEqual(messages, [
    ['house/attic', { celsius: 9 }, true],
    ['house/kitchen', { celsius: 21, note: 'später' }, true],
  ])

  await retain('house/kitchen', JSON.stringify({ celsius: 22 }))
  const live = (await received(late, 3))[2]
  assert.deepStrictEqual([live.topic, live.packet.retain], ['house/kitchen', false])
  await end(late)
  await end(publisher)
})
