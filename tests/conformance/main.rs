//! What the MQTT specifications demand of a server, statement by statement, against the real
//! broker over TCP. Clause ids are those of version 5 unless prefixed `mqtt311_` or `mqtt31_`.

mod auth;
mod connect;
mod disconnect;
mod flow_control;
mod keep_alive;
mod limits;
mod malformed;
mod ping;
mod properties;
mod publish;
mod qos;
mod retained;
mod session;
mod shared;
mod subscribe;
mod support;
mod sys;
mod takeover;
mod topics;
mod unsubscribe;
mod will;
