#!/usr/bin/env python3
"""Makes the files beside it: a server's operator and accounts, and credentials of users.

They are committed because the crates that make them are twenty, for one test. Their keys are for nothing else. Needs `openssl` 3.
"""
import base64
import hashlib
import json
import os
import subprocess
import tempfile

OPERATOR, ACCOUNT, USER, SEED = 14 << 3, 0, 20 << 3, 18 << 3
UNLIMITED = ["subs", "data", "payload", "imports", "exports", "conn", "leaf", "mem_storage", "disk_storage", "streams", "consumer"]


def crc16(data):
    crc = 0
    for byte in data:
        crc ^= byte << 8
        for _ in range(8):
            crc = (crc << 1 ^ (0x1021 if crc & 0x8000 else 0)) & 0xFFFF
    return crc


def encoded(data):
    return base64.b32encode(data + crc16(data).to_bytes(2, "little")).decode().rstrip("=")


def url64(data):
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def openssl(*arguments):
    return subprocess.run(["openssl", *arguments], check=True, capture_output=True).stdout


class Key:
    def __init__(self, kind, folder):
        self.kind, seed = kind, os.urandom(32)
        self.file = os.path.join(folder, seed.hex())
        with open(self.file, "wb") as file:
            file.write(bytes.fromhex("302e020100300506032b657004220420") + seed)
        self.public = encoded(bytes([kind]) + openssl("pkey", "-inform", "DER", "-in", self.file, "-pubout", "-outform", "DER")[-32:])
        self.seed = encoded(bytes([SEED | kind >> 5, (kind & 31) << 3]) + seed)

    def sign(self, data):
        with tempfile.NamedTemporaryFile() as file:
            file.write(data)
            file.flush()
            return openssl("pkeyutl", "-sign", "-rawin", "-keyform", "DER", "-inkey", self.file, "-in", file.name)


def token(signer, subject, name, kind, **claims):
    body = {"iat": 1700000000, "iss": signer.public, "name": name, "sub": subject.public, "nats": {**claims, "type": kind, "version": 2}}
    body["jti"] = base64.b32encode(hashlib.sha256(json.dumps(body).encode()).digest()).decode().rstrip("=")
    parts = [{"typ": "JWT", "alg": "ed25519-nkey"}, body]
    text = ".".join(url64(json.dumps(part, separators=(",", ":")).encode()) for part in parts)
    return f"{text}.{url64(signer.sign(text.encode()))}"


def account(operator, key, name, limits):
    return token(operator, key, name, "account", limits={"wildcards": True, **limits}, default_permissions={"pub": {}, "sub": {}})


def credentials(name, signer, folder):
    key = Key(USER, folder)
    user = token(signer, key, name, "user", pub={}, sub={}, subs=-1, data=-1, payload=-1)
    parts = [("NATS USER JWT", user), ("USER NKEY SEED", key.seed)]
    with open(f"{name}.creds", "w") as file:
        file.write("\n".join(f"-----BEGIN {what}-----\n{text}\n------END {what}------\n" for what, text in parts))


os.chdir(os.path.dirname(os.path.abspath(__file__)))
with tempfile.TemporaryDirectory() as folder:
    operator, system, pools, unknown = Key(OPERATOR, folder), *(Key(ACCOUNT, folder) for _ in range(3))
    all_limits = dict.fromkeys(UNLIMITED, -1)
    no_storage = {name: -1 for name in UNLIMITED[:7]}
    accounts = [(system, "system", no_storage), (pools, "pools", all_limits)]
    with open("server.conf", "w") as file:
        file.write(f"operator: {token(operator, operator, 'tests', 'operator', system_account=system.public)}\n")
        file.write(f"system_account: {system.public}\nresolver: MEMORY\nresolver_preload: {{\n")
        for key, name, limits in accounts:
            file.write(f"  {key.public}: {account(operator, key, name, limits)}\n")
        file.write("}\n")
    credentials("user", pools, folder)
    # Of an account that the server does not have.
    credentials("stranger", unknown, folder)
