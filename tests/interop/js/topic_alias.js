// MQTT 5: aliases of the publisher are resolved, and not shown to a subscriber that allows none.
'use strict'

const assert = require('assert')
const { connect, end, payloads, publish, received, run, subscribe } = require('./harness')

run(async () => {
  const subscriber = await connect()
  const publisher = await connect({ autoAssignTopicAlias: true })
  await subscribe(subscriber, 'building/+/temperature', { qos: 1 })
  const maximum = (publisher.connack.properties || {}).topicAliasMaximum || 0
  assert.ok(maximum > 0, 'the broker allows topic aliases')

  const sent = []
  publisher.on('packetsend', (packet) => {
    if (packet.cmd === 'publish') sent.push([packet.topic, packet.properties])
  })
  // The second round is sent by alias alone.
  for (const round of ['first', 'second']) {
    for (const floor of ['1', '2']) {
      await publish(publisher, `building/${floor}/temperature`, `${round} ${floor}`, { qos: 1 })
    }
  }

  assert.deepStrictEqual(sent.map(([topic]) => topic.length > 0), [true, true, false, false])
  const messages = await received(subscriber, 4)
  assert.deepStrictEqual(payloads(messages), ['first 1', 'first 2', 'second 1', 'second 2'])
  for (const { topic, payload, packet } of messages) {
    assert.strictEqual(topic, `building/${payload.slice(-1)}/temperature`)
    assert.strictEqual((packet.properties || {}).topicAlias, undefined)
  }
  await end(publisher)
  await end(subscriber)
})
