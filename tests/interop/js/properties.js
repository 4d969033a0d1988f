// MQTT 5: properties of PUBLISH in both directions, subscription identifiers, no-local, a session
// that ends with its connection, and an assigned client identifier.
'use strict'

const assert = require('assert')
const { connect, end, payloads, publish, received, run, subscribe } = require('./harness')

run(async () => {
  const subscriber = await connect({ clientId: '' })
  assert.ok(subscriber.connack.properties.assignedClientIdentifier)
  await subscribe(subscriber, 'request', { qos: 1, properties: { subscriptionIdentifier: 268435455 } })
  await subscribe(subscriber, 'own', { qos: 1, nl: true })
  const publisher = await connect()

  await publish(publisher, 'request', 'ping', {
    qos: 1,
    properties: {
      payloadFormatIndicator: true,
      messageExpiryInterval: 3600,
      responseTopic: 'answers/7',
      correlationData: Buffer.from([0, 255, 7]),
      userProperties: { unit: '°C', many: ['1', '2'] },
      contentType: 'text/plain',
    },
  })
  const [{ packet }] = await received(subscriber, 1)
  const properties = { ...packet.properties, userProperties: { ...packet.properties.userProperties } }
  assert.deepStrictEqual(properties, {
    payloadFormatIndicator: true,
    messageExpiryInterval: 3600,
    responseTopic: 'answers/7',
    correlationData: Buffer.from([0, 255, 7]),
    userProperties: { unit: '°C', many: ['1', '2'] },
    contentType: 'text/plain',
    subscriptionIdentifier: 268435455,
  })

  await publish(subscriber, 'own', 'not for me', { qos: 1 })
  await publish(publisher, 'own', 'for you', { qos: 1 })
  assert.deepStrictEqual(payloads(await received(subscriber, 2)), ['ping', 'for you'])
  await end(subscriber)
  await end(publisher)
})
