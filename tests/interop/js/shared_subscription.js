// MQTT 5: a shared subscription gives each message to one member of the group.
'use strict'

const assert = require('assert')
const { connect, end, numbers, payloads, publish, received, run, subscribe } = require('./harness')

run(async () => {
  const members = [await connect(), await connect(), await connect()]
  for (const member of members) {
    await subscribe(member, '$share/workers/jobs/#', { qos: 1 })
    await subscribe(member, 'end', { qos: 1 })
  }
  const publisher = await connect()
  for (const number of numbers(0, 30)) {
    await publish(publisher, 'jobs/new', number, { qos: 1 })
  }
  await publish(publisher, 'end', 'end', { qos: 1 })

  const jobs = []
  for (const member of members) {
    while (!payloads(member.received).includes('end')) {
      await received(member, member.received.length + 1)
    }
    assert.ok(member.received.length > 1, 'every member works')
    jobs.push(...payloads(member.received).filter((payload) => payload !== 'end'))
    await end(member)
  }
  assert.deepStrictEqual(jobs.sort((a, b) => a - b), numbers(0, 30))
  await end(publisher)
})
