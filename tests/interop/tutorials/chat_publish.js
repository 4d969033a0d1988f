// client-a of an introduction to MQTT.js and Mosca: sends COUNT messages to the one who is away.
var mqtt = require('mqtt');

var client = mqtt.connect(process.env.BROKER_URL, { clientId: 'client-a' });

client.on('connect', function () {
  for (var i = 0; i < Number(process.env.COUNT); i++) {
    client.publish('chat', '发布new测试信息' + i, { qos: 1 });
  }
  client.end();
});
