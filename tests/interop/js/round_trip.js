// Subscribes before the connection is up, on whatever transport BROKER_URL names;
// CERTIFICATE_AUTHORITY is the file of the authority to trust. The payload is binary and large.
'use strict'

const assert = require('assert')
const crypto = require('crypto')
const fs = require('fs')
const { end, publish, received, run, start, subscribe } = require('./harness')

run(async () => {
  const authority = process.env.CERTIFICATE_AUTHORITY
  const client = start(authority ? { ca: fs.readFileSync(authority) } : {})
  const payload = crypto.randomBytes(300000)
  await subscribe(client, 'round/trip', { qos: 2 })
  await publish(client, 'round/trip', payload, { qos: 2 })

  const [message] = await received(client, 1)
  assert.ok(message.packet.payload.equals(payload))
  await end(client)
})
