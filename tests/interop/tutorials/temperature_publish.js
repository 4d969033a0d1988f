// publish.js of iiter.cn/blogs/13 (github.com/isnl/mqtt-server).
const mqtt = require("mqtt");
const client = mqtt.connect(process.env.BROKER_URL); //连接到mqtt服务端
//写个定时器定时每隔3秒定时推送天气信息，此业务可替换为自己的实际需求
setInterval(function() {
  const value = Math.ceil(Math.random() * 40);
  client.publish("temperature", value.toString(), { qos: 0, retain: true });
}, 3000);
