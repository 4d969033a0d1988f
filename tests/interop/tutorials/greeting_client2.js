// client2.js of "Getting started with MQTT" (thejackalofjavascript.com), with mqtt.connect instead
// of createClient as in its Chinese translation.
var mqtt = require('mqtt')
// client = mqtt.createClient(1883,'localhost');
client  = mqtt.connect(process.env.BROKER_URL)
client.subscribe('presence');
client.on('message',function(topic,message){
	console.log(message.toString());
});
console.log('client started ...');
