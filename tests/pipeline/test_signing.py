"""A signed folder: a stranger with the public key finds every change, and hears what nobody checked."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import pty
import shutil
import stat
import subprocess
import sys

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from run_files import GIVEN, stamps

from example_run import AUDIT
from palinode.errors import CheckpointError, InputError, MismatchError
from palinode.pipeline.run import unlearn
from palinode.pipeline.signing import PASSWORD, check_signature, new_key, open_key, payload_of, sign_folder


@pytest.fixture(scope="module")
def run(tiny, recipe_of, tmp_path_factory):
    """An unlearned model's folder that nobody signed, and keys of an owner; read them only."""
    home = tmp_path_factory.mktemp("signing")
    unlearn(recipe_of(home / "out", scales=GIVEN, training={"epochs": 1}))
    new_key(home / "owner.key")
    new_key(home / "other.key")
    return home


@pytest.fixture
def out(run, tmp_path):
    """A copy of the folder."""
    return shutil.copytree(run / "out", tmp_path / "out")


@pytest.fixture
def signed(run, out):
    """A copy of the folder, signed by the owner."""
    sign_folder(out, run / "owner.key")
    return out


def faults(folder, run, key="owner.key.pub", **options):
    return check_signature(folder, run / key, **options).faults


def test_the_public_key_alone_shows_that_nothing_changed(run, signed):
    found = check_signature(signed, run / "owner.key.pub")
    assert (found.ok, found.trusted) == (True, True)
    assert len(found.checked) == 3
    assert any("whose key it is" in sentence for sentence in found.unchecked)


def test_the_librarys_own_command_accepts_the_signature(run, signed):
    words = [sys.executable, "-m", "model_signing", "verify", "key", str(signed)]
    words += ["--signature", str(signed / "model.sig"), "--public_key", str(run / "owner.key.pub")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "Verification succeeded\n"), done.stderr
    (signed / "README.md").write_text("changed")
    assert subprocess.run(words, capture_output=True, text=True).returncode == 1


def test_sigstore_can_read_what_it_would_sign(signed):
    from sigstore.dsse import Statement

    Statement(payload_of("out", {"a/b": "00" * 32, "a.b": "11" * 32}))


def test_without_a_key_it_says_that_nobody_checked_by_whom(signed):
    found = check_signature(signed)
    assert (found.ok, found.trusted) == (True, False)
    assert found.unchecked[0].startswith("who signed (--public-key FILE")


def test_a_folder_that_nobody_signed_is_no_fault_unless_somebody_asks(run, out):
    assert check_signature(out) is None
    assert faults(out, run)[0] == f"{out} is not signed: it has no model.sig"


def change(path, old=b"", new=b""):
    raw = path.read_bytes()
    path.write_bytes(raw.replace(old, new) if old else raw[:-1] + bytes([raw[-1] ^ 1]))


def edit_verdict(folder):
    content = json.loads((folder / "record.json").read_text())
    content["verdict"]["sentence"] = "All is well."
    (folder / "record.json").write_text(json.dumps(content))


def state_another_model(folder):
    content = json.loads((folder / "statement.json").read_text())
    content["predicate"]["models"]["unlearned"] = "0" * 32
    (folder / "statement.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "sentences"),
    [
        (
            lambda out: change(out / "model.safetensors"),
            ["model.safetensors was changed after it was signed"],
        ),
        (
            lambda out: change(out / "report.html", b"e", b"a"),
            ["report.html is not the report that was signed"],
        ),
        (lambda out: (out / "README.md").unlink(), ["what was signed is not there any more: README.md"]),
        (lambda out: (out / "extra.txt").write_text(""), ["what nobody signed lies there too: extra.txt"]),
        (edit_verdict, ["record.json is not the record", "and record.json 'All is well.'"]),
        (state_another_model, ["statement.json is not the statement", f"of another model ({'0' * 32})"]),
        (
            lambda out: (out / "statement.json").unlink(),
            ["any more: statement.json", "cannot be held against"],
        ),
        (lambda out: (out / "model.sig").unlink(), ["is not signed: it has no model.sig"]),
        (lambda out: (out / "model.sig").write_text("{}"), ["model.sig is damaged, or no signature"]),
        (lambda out: (out / "model.sig").write_text("no"), ["model.sig is damaged, or no signature"]),
        (lambda out: (out / "model.sig").write_text("[" * 9999), ["model.sig is damaged, or no signature"]),
    ],
)
def test_each_change_has_its_own_sentence(run, signed, damage, sentences):
    damage(signed)
    found = faults(signed, run)
    assert len(found) == len(sentences), found
    assert all(sentence in fault for sentence, fault in zip(sentences, found, strict=True)), found
    assert check_signature(signed).faults == found


@pytest.mark.parametrize(
    "content", ["[]", "{", '{"predicate": 3}', '{"predicate": {"forget": {}}}', "[" * 9999]
)
def test_a_statement_that_is_none_is_said_to_be_none(run, signed, content):
    (signed / "statement.json").write_text(content)
    found = faults(signed, run)
    assert found[0] == "statement.json is not the statement that was signed"
    assert found[1].startswith("statement.json cannot be held against the folder (")


def test_a_statement_that_lacks_parts_tells_otherwise(run, signed):
    content = json.loads((signed / "statement.json").read_text())
    del content["subject"], content["predicate"]["recipe"]
    (signed / "statement.json").write_text(json.dumps(content))
    assert faults(signed, run)[1].endswith("tells otherwise than the folder of recipe, digests")


def test_verify_tells_in_words_and_as_json(run, signed, palinode):
    words = ("verify", signed, "--public-key", run / "owner.key.pub", "-q")
    said = palinode(*words)
    assert said.code == 0
    assert f"{signed} is signed by the key " in said.out
    assert "  not checked: whose key it is" in said.out
    (signed / "config.json").unlink()
    said = palinode(*words)
    assert said.code == 1
    assert said.out.startswith(f"{signed} is NOT as it was signed:\n  fault: what was signed is not there")
    assert "  fault: the weights cannot be compared: " in said.out
    told = json.loads(palinode(*words, "--json").out)
    assert (told["ok"], told["signature"]["trusted"], len(told["signature"]["faults"])) == (False, True, 2)


def test_a_byte_that_changed_in_any_file_is_found(run, signed, palinode):
    files = [path for path in sorted(signed.iterdir()) if path.name != "model.sig"]
    assert len(files) == 12
    for path in files:
        raw = path.read_bytes()
        path.write_bytes(raw[:-9] + b"\xff" + raw[-8:])  # which is no UTF-8
        said = palinode("verify", signed, "--public-key", run / "owner.key.pub", "-q")
        assert (said.code, f"  fault: {path.name} " in said.out) == (1, True), said
        path.write_bytes(raw)
    assert palinode("verify", signed, "--public-key", run / "owner.key.pub", "-q").code == 0


def test_another_key_did_not_sign(run, signed):
    (fault,) = faults(signed, run, "other.key.pub")
    assert "signed by another (the key " in fault
    assert not check_signature(signed, run / "other.key.pub").trusted


def test_a_signature_that_names_the_key_and_is_not_its_own_is_forged(run, signed, tmp_path):
    before = json.loads((signed / "model.sig").read_text())
    sign_folder(signed, run / "other.key")
    forged = json.loads((signed / "model.sig").read_text())
    forged["verificationMaterial"] = before["verificationMaterial"]
    (signed / "model.sig").write_text(json.dumps(forged))
    (fault,) = faults(signed, run)
    assert "was changed, or forged" in fault


def test_a_signed_list_of_other_files_is_not_by_the_key(run, signed):
    """Somebody changes a file, and the list of digests with it."""
    before = json.loads((signed / "model.sig").read_text())
    (signed / "README.md").write_text("changed")
    payload = base64.b64decode(before["dsseEnvelope"]["payload"]).replace(b'"README.md"', b'"README.txt"')
    before["dsseEnvelope"]["payload"] = base64.b64encode(payload).decode()
    (signed / "model.sig").write_text(json.dumps(before))
    assert any("was changed, or forged" in fault for fault in faults(signed, run))


def test_whoever_has_the_salt_can_show_which_rows_were_meant(run, tiny, signed):
    salt = signed.with_name("out.salt")
    assert stat.S_IMODE(salt.stat().st_mode) == 0o600
    found = check_signature(signed, salt=salt, forget=tiny.forget)
    assert any(f"rows of {tiny.forget} are those" in sentence for sentence in found.checked)
    assert "are not those" in faults(signed, run, salt=salt, forget=tiny.retain)[0]
    other = salt.with_name("other.salt")
    other.write_text("0" * 64)
    assert "are not those" in faults(signed, run, salt=other, forget=tiny.forget)[0]


def test_the_statement_holds_no_text_of_the_rows_and_no_digest_of_them_without_salt(world, signed):
    text = (signed / "statement.json").read_text()
    record = json.loads((signed / "record.json").read_text())
    assert record["data"]["forget"]["fingerprint"] not in text
    assert [fact.prompt for fact in world.forget if fact.prompt in text] == []


def test_signing_again_keeps_the_salt_and_replaces_the_signature(run, signed, tmp_path, palinode):
    before = json.loads((signed / "statement.json").read_text())["predicate"]
    content = json.loads((signed / "record.json").read_text())
    audit = {**AUDIT, "models": {"audited": content["models"]["unlearned"]}}
    (tmp_path / "audit").mkdir()
    (tmp_path / "audit" / "audit.json").write_text(json.dumps(audit))
    said = palinode("report", signed, "--audit", tmp_path / "audit")
    assert said.code == 0
    assert "sign it anew" in said.err
    assert not check_signature(signed).ok
    sign_folder(signed, run / "owner.key")
    after = json.loads((signed / "statement.json").read_text())["predicate"]
    assert check_signature(signed, run / "owner.key.pub").ok
    assert after["forget"] == before["forget"]
    assert (before["audit"], after["audit"]["passed"]) == (None, False)


def test_what_is_stale_or_damaged_is_not_signed(run, out):
    edit_verdict(out)
    with pytest.raises(MismatchError, match="palinode report"):
        sign_folder(out, run / "owner.key")
    shutil.copy(run / "out" / "record.json", out)
    change(out / "model.safetensors")
    with pytest.raises(CheckpointError, match="is not what was written"):
        sign_folder(out, run / "owner.key")
    assert not (out / "model.sig").exists()


@pytest.mark.parametrize("name", ["report.json", "report.html", "report.md"])
def test_a_report_of_another_run_is_not_signed(run, out, name):
    known = json.loads((out / "record.json").read_text())["models"]["unlearned"]["fingerprint"]
    change(out / name, known.encode(), b"0" * 32)
    with pytest.raises(MismatchError, match=f"{name} in .* of another run"):
        sign_folder(out, run / "owner.key")


def test_a_signed_folder_can_be_moved(run, signed, tmp_path):
    moved = signed.rename(tmp_path / "elsewhere")
    assert check_signature(moved, run / "owner.key.pub").ok


@pytest.mark.parametrize("place", ["owner.key", "nowhere", "."])
def test_links_are_not_signed(run, out, signed, place):
    (out / "link").symlink_to(run / place)
    assert faults(signed, run) == ["what nobody signed lies there too: link"]
    with pytest.raises(CheckpointError, match="is a link"):
        sign_folder(out, run / "owner.key")


def test_a_copy_made_of_links_is_read_as_what_it_leads_to(run, signed, tmp_path):
    """As the cache of the hub is one."""
    shutil.copytree(signed, tmp_path / "blobs")
    for path in signed.iterdir():
        path.unlink()
        path.symlink_to(tmp_path / "blobs" / path.name)
    assert check_signature(signed, run / "owner.key.pub").ok


def test_sigstore_is_not_asked_about_a_key_and_needs_a_network(signed):
    (fault,) = check_signature(signed, identity="ada@example.org").faults
    assert fault == "not signed by ada@example.org: a key was used, which is nobody's identity"
    before = stamps(signed)
    with pytest.raises(InputError, match="Sigstore did not sign"):
        sign_folder(signed, identity="ada@example.org", issuer="http://127.0.0.1:9")
    assert stamps(signed) == before


@pytest.mark.parametrize("place", ["out/salt", "out/deeper/../salt"])
def test_the_salt_is_not_handed_over(run, out, place):
    (out / "deeper").mkdir()
    with pytest.raises(InputError, match="lies in the folder that is handed over"):
        sign_folder(out, run / "owner.key", salt=out.parent / place)


def pem(key, password=None):
    locked = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, locked)


def test_keys_that_cannot_be_used_say_why(run, out, signed, tmp_path, monkeypatch):
    def refusal(content):
        (tmp_path / "key").write_bytes(content)
        with pytest.raises(InputError) as refused:
            sign_folder(out, tmp_path / "key")
        return str(refused.value)

    assert "no private key that can be used; it takes an ECDSA key" in refusal(
        pem(ed25519.Ed25519PrivateKey.generate())
    )
    assert "takes an ECDSA key on P-256" in refusal(pem(ec.generate_private_key(ec.SECP256K1())))
    assert "no private key that can be used" in refusal(b"ssh-ed25519 AAAA")
    assert "no private key that can be used" in refusal((run / "owner.key.pub").read_bytes())
    locked = pem(ec.generate_private_key(ec.SECP384R1()), b"right")
    assert PASSWORD in refusal(locked)
    monkeypatch.setenv(PASSWORD, "wrong")
    assert "is not opened by this password" in refusal(locked)
    monkeypatch.setenv(PASSWORD, "right")
    assert "key" in sign_folder(out, tmp_path / "key").signer
    with pytest.raises(InputError, match="which nobody should be shown"):
        check_signature(signed, run / "owner.key")
    with pytest.raises(InputError, match="cannot be read"):
        check_signature(signed, run / "nowhere.pub")


def test_a_new_key_is_its_owners_alone_and_no_key_is_overwritten(tmp_path, monkeypatch):
    before = os.umask(0)
    try:
        public, known = new_key(tmp_path / "my.key", "secret")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "my.key").stat().st_mode) == 0o600
    assert b"ENCRYPTED" in (tmp_path / "my.key").read_bytes()
    assert known == hashlib.sha256(public.read_bytes()).hexdigest()
    assert public == tmp_path / "my.key.pub"
    with pytest.raises(InputError, match="is there already"):
        new_key(tmp_path / "my.key")
    (tmp_path / "my.key").unlink()
    with pytest.raises(InputError, match="is there already"):
        new_key(tmp_path / "my.key")
    assert not (tmp_path / "my.key").exists()


def test_a_key_that_others_can_read_is_told_of(run, out, tmp_path):
    key = shutil.copy(run / "owner.key", tmp_path / "open.key")
    key.chmod(0o644)
    assert "chmod 600" in sign_folder(out, key).notes[0]
    assert sign_folder(out, run / "owner.key").notes == ()


def test_a_terminal_asks_for_the_password_of_a_new_key(tmp_path):
    main, other = pty.openpty()
    words = [sys.executable, "-m", "palinode", "sign", "--new-key", str(tmp_path / "my.key")]
    run = subprocess.Popen(words, stdin=other, stdout=other, stderr=other, start_new_session=True)
    os.close(other)
    found = b""
    with contextlib.suppress(OSError):  # the other end is closed
        for prompt in (f"Password of {tmp_path / 'my.key'}: ", "Repeat for confirmation: "):
            while not found.endswith(prompt.encode()):
                found += os.read(main, 65536)
            os.write(main, b"secret\n")
        while part := os.read(main, 65536):
            found += part
    os.close(main)
    assert run.wait() == 0, found
    assert b"secret" not in found
    assert open_key(tmp_path / "my.key", "secret")
