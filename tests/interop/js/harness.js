// What the scripts share: clients of any version of MQTT.js, with promises.
'use strict'

const mqtt = require('mqtt')
const { once } = require('events')

const url = process.env.BROKER_URL
const protocolVersion = Number(process.env.PROTOCOL_VERSION || 4)

// CONNECT options for the protocol version under test. `clean: false` means a session that
// outlives the connection in every version.
function connectOptions(options = {}) {
  const all = { protocolVersion, reconnectPeriod: 0, ...options }
  if (protocolVersion === 3) {
    all.protocolId = 'MQIsdp'
  }
  if (protocolVersion === 5 && all.clean === false) {
    all.properties = { sessionExpiryInterval: 3600, ...all.properties }
  }
  return all
}

// A client that has not yet connected. Its messages are in `client.received`.
function start(options, brokerUrl = url) {
  const client = mqtt.connect(brokerUrl, connectOptions(options))
  client.received = []
  client.on('message', (topic, payload, packet) => {
    client.received.push({ topic, payload: payload.toString(), packet })
    client.emit('received')
  })
  return client
}

// A connected client; `client.connack` is the broker's answer.
async function connect(options, brokerUrl) {
  const client = start(options, brokerUrl)
  const [connack] = await once(client, 'connect')
  client.connack = connack
  return client
}

function promise(call) {
  return new Promise((resolve, reject) => {
    call((error, result) => (error ? reject(error) : resolve(result)))
  })
}

const subscribe = (client, filter, options) =>
  promise((done) => client.subscribe(filter, options, done))

const publish = (client, topic, payload, options) =>
  promise((done) => client.publish(topic, payload, options, done))

// DISCONNECT, after all acknowledgements.
const end = (client) => promise((done) => client.end(false, {}, done))

// Closes the connection without DISCONNECT, as a crash does.
async function drop(client) {
  const closed = once(client, 'close')
  client.stream.destroy()
  await closed
}

// Waits until the client has received `count` messages, and returns them.
async function received(client, count) {
  while (client.received.length < count) {
    await once(client, 'received')
  }
  return client.received
}

const payloads = (messages) => messages.map((message) => message.payload)

const numbers = (from, to) => Array.from({ length: to - from }, (_, index) => String(from + index))

// Runs the scenario; any failure ends the process with a status that the test sees.
function run(scenario) {
  scenario().then(
    () => process.exit(0),
    (error) => {
      console.error(error)
      process.exit(1)
    },
  )
}

module.exports = {
  connect,
  drop,
  end,
  numbers,
  payloads,
  protocolVersion,
  publish,
  received,
  run,
  start,
  subscribe,
  url,
}
