//! Sections 3.15, 4.12 and 3.1.4: authentication.

use std::io::Write;

use tempfile::NamedTempFile;

use crate::support::{Broker, Connect, V5, Version, both_versions, property, wire};

both_versions! {
    mqtt_3_1_4_2_anonymous_client_is_refused_where_it_is_not_allowed,
    mqtt_3_1_4_2_right_password_is_accepted,
    mqtt_3_1_4_2_wrong_password_is_refused,
    mqtt_3_1_4_2_unknown_user_is_refused,
    mqtt_3_1_4_2_user_without_password_is_refused,
    user_name_is_accepted_where_anybody_is,
    user_name_without_password_is_accepted_where_anybody_is,
}

/// A broker that lets in `user` with the password `secret` and nobody else.
fn guarded() -> (Broker, NamedTempFile) {
    let mut users = NamedTempFile::new().expect("a temporary file");
    // Made by mosquitto_passwd.
    let hash = "d+0DE2LEhlPEUVO2$JyuyJYMbYcN+bGFLLrz6IspvRvhTcQRuDvXQyVRS2g393kS/cQu9mdAQIPm5YrLtclBNAzrgOpr19FE7TfNprA==";
    writeln!(users, "user:$7$101${hash}").expect("a temporary file");
    let path = users.path().display().to_string();
    let broker = Broker::start_with(&[("auth.anonymous", "false"), ("auth.users_file", &path)]);
    (broker, users)
}

fn mqtt_3_1_4_2_anonymous_client_is_refused_where_it_is_not_allowed(version: Version) {
    let (broker, _users) = guarded();
    let mut client = broker.open(version);

    client.send(&Connect::new(version, "c").bytes());

    client.expect_refused(0x05, 0x87);
}

fn mqtt_3_1_4_2_right_password_is_accepted(version: Version) {
    let (broker, _users) = guarded();

    let (mut client, _) = broker.connect_with(
        &Connect::new(version, "c")
            .user_name("user")
            .password("secret"),
    );

    client.ping();
}

fn mqtt_3_1_4_2_wrong_password_is_refused(version: Version) {
    expect_credentials_refused(
        &Connect::new(version, "c")
            .user_name("user")
            .password("guess"),
    );
}

fn mqtt_3_1_4_2_unknown_user_is_refused(version: Version) {
    expect_credentials_refused(
        &Connect::new(version, "c")
            .user_name("nobody")
            .password("secret"),
    );
}

fn mqtt_3_1_4_2_user_without_password_is_refused(version: Version) {
    expect_credentials_refused(&Connect::new(version, "c").user_name("user"));
}

#[track_caller]
fn expect_credentials_refused(connect: &Connect) {
    let (broker, _users) = guarded();
    let mut client = broker.open(connect.version);

    client.send(&connect.bytes());

    client.expect_refused(0x04, 0x86);
}

fn user_name_is_accepted_where_anybody_is(version: Version) {
    let broker = Broker::start();
    let connect = Connect::new(version, "c")
        .user_name("somebody")
        .password(&b"\x00\xFF"[..]);

    let (mut client, _) = broker.connect_with(&connect);

    client.ping();
}

fn user_name_without_password_is_accepted_where_anybody_is(version: Version) {
    let broker = Broker::start();

    let (mut client, _) = broker.connect_with(&Connect::new(version, "c").user_name("somebody"));

    client.ping();
}

#[test]
fn mqtt_4_12_0_1_unknown_authentication_method_is_refused() {
    let broker = Broker::start();
    let mut client = broker.open(V5);
    let connect = Connect::new(V5, "c")
        .property(property::authentication_method("no such method"))
        .property(property::authentication_data(b"data"));

    client.send(&connect.bytes());

    client.expect_refused(0x05, 0x8C);
}

#[test]
fn authentication_data_without_a_method_is_a_protocol_error() {
    let broker = Broker::start();
    let mut client = broker.open(V5);

    client.send(
        &Connect::new(V5, "c")
            .property(property::authentication_data(b"data"))
            .bytes(),
    );

    client.expect_refused(0x03, 0x82);
}

#[test]
fn mqtt_4_12_0_7_auth_without_an_authentication_method_in_connect_is_a_protocol_error() {
    let broker = Broker::start();
    let mut client = broker.connect(V5, "c");
    let properties = wire::encode_properties(&[property::authentication_method("SCRAM-SHA-256")]);

    client.send(&wire::frame(0xF0, &[vec![0x19], properties].concat()));

    client.expect_disconnect(0x82);
}

#[test]
fn mqtt_3_15_1_1_reserved_flags_of_auth_are_malformed() {
    let broker = Broker::start();
    let mut client = broker.connect(V5, "c");

    client.send(&wire::frame(0xF1, &[]));

    client.expect_disconnect_with(&[0x81, 0x82]);
}
