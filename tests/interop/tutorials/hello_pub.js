// pub.js of a tutorial on offline messages with Mosca and MQTT.js, with its change for offline
// messages (clean: false). The clients have fixed names.
//客户端引入mqtt
let mqtt = require('mqtt');

let client = mqtt.connect('mqtt://localhost', {
  port: process.env.BROKER_PORT,
  clientId: 'cli_pub',
  clean: false//增加了此项
})

let num = 0;
setInterval(function (){
  client.publish('test',
  'Hello mqtt ' + (++num),
  {qos:1},
  () => console.log(num));
}, 1000)
