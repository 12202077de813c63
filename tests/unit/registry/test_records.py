import msgspec
from hypothesis import given, strategies as st

from gateway.registry.notices import Changed, Notice, Published
from gateway.registry.records import CredentialRecord, RealmRecord, identity_key

credential_records = st.builds(
    CredentialRecord,
    credential_id=st.integers(0, 2**62),
    device_id=st.integers(0, 2**62),
    realm_id=st.integers(0, 2**62),
    device=st.text(),
    group=st.none() | st.text(),
    labels=st.dictionaries(st.text(), st.text(), max_size=4),
    disabled=st.booleans(),
    revoked=st.booleans(),
    not_before=st.none() | st.floats(0, 1e10),
    not_after=st.none() | st.floats(0, 1e10),
    networks=st.lists(st.text(), max_size=3).map(tuple),
    hash=st.sampled_from(["sha256", "sha384"]),
    sealed_key=st.binary(),
    used_on=st.integers(-1, 2**31),
)


@given(credential_records)
def test_records_survive_the_replica(record: CredentialRecord) -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(record), type=CredentialRecord) == record


@given(st.dictionaries(st.binary(), st.none() | credential_records, max_size=3))
def test_notices_survive_the_way_to_the_workers(overlay: dict[bytes, CredentialRecord | None]) -> None:
    notices: list[Notice] = [
        Published("/data/replica/x", 7),
        Changed(8, ((1, 3), (5, 5)), realms=True, committed_at=1.25, overlay=overlay),
    ]
    for notice in notices:
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(notice), type=Notice) == notice


def test_a_later_version_may_add_fields() -> None:
    class Extended(RealmRecord, frozen=True, array_like=True):
        colour: str | None = None

    old = RealmRecord(1, "default", None)
    new = Extended(1, "default", None, colour="red")
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(old), type=Extended) == Extended(1, "default", None)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(new), type=RealmRecord) == old


def test_records_of_before_are_read_with_defaults() -> None:
    realm = msgspec.msgpack.decode(msgspec.msgpack.encode([1, "default", None]), type=RealmRecord)
    assert realm == RealmRecord(1, "default", None)
    assert (realm.key_source, realm.enrolls, realm.idle_days, realm.service_day) == ("stored", False, None, 0)
    fields = [1, 2, 3, "m", None, {}, False, False, None, None, [], "sha256", b"sealed"]
    record = msgspec.msgpack.decode(msgspec.msgpack.encode(fields), type=CredentialRecord)
    assert (record.device_id, record.sealed_key, record.used_on) == (2, b"sealed", 0)


def test_a_credential_is_enabled_unless_disabled_or_revoked() -> None:
    record = CredentialRecord(1, 1, 1, "m", None, {}, False, False, None, None, (), "sha256", b"")
    assert record.enabled
    assert not msgspec.structs.replace(record, disabled=True).enabled
    assert not msgspec.structs.replace(record, revoked=True).enabled


@given(st.integers(0, 2**62), st.binary(), st.integers(0, 2**62), st.binary())
def test_identity_keys_name_one_identity_of_one_realm(
    realm: int, identity: bytes, realm2: int, identity2: bytes
) -> None:
    same = (realm, identity) == (realm2, identity2)
    assert (identity_key(realm, identity) == identity_key(realm2, identity2)) == same
