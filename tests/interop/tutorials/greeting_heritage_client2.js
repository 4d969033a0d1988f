// client2.js of "Getting started with MQTT" (thejackalofjavascript.com), with createClient as in
// the original, for MQTT.js 0.3.
var mqtt = require('mqtt')
client  = mqtt.createClient(process.env.BROKER_PORT, 'localhost')
client.subscribe('presence');
client.on('message',function(topic,message){
	console.log(message.toString());
});
console.log('client started ...');
