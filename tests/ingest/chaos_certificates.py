"""Certificates of the chaos server: one good, the others each with one fault."""

import datetime
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

TLS_KINDS = ("good", "expired", "self_signed", "wrong_host", "plain", "mute")
"""Listeners: ``plain`` speaks HTTP without TLS, ``mute`` nothing at all."""
_DAY = datetime.timedelta(days=1)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _pem(key: ec.EllipticCurvePrivateKey, *certificates: x509.Certificate) -> bytes:
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return private + b"".join(c.public_bytes(serialization.Encoding.PEM) for c in certificates)


class _Authority:
    def __init__(self, name: str) -> None:
        self.name = name
        self.key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.datetime.now(datetime.UTC)
        self.certificate = (
            x509.CertificateBuilder()
            .subject_name(_name(name))
            .issuer_name(_name(name))
            .public_key(self.key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - 400 * _DAY)
            .not_valid_after(now + 30 * _DAY)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(self.key.public_key()), critical=False
            )
            .sign(self.key, hashes.SHA256())
        )

    def sign(self, host: x509.GeneralName, first_day: int, last_day: int) -> bytes:
        """Key and certificate of a server, valid between days counted from today."""
        key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.datetime.now(datetime.UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(_name("chaos"))
            .issuer_name(_name(self.name))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + first_day * _DAY)
            .not_valid_after(now + last_day * _DAY)
            .add_extension(x509.SubjectAlternativeName([host]), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()),
                critical=False,
            )
            .sign(self.key, hashes.SHA256())
        )
        return _pem(key, certificate)


def write_certificates(folder: Path) -> dict[str, Path]:
    """Kind -> file of key and certificate; ``authority`` is what a client must trust."""
    folder.mkdir(parents=True, exist_ok=True)
    ours, another = _Authority("chaos authority"), _Authority("another authority")
    loopback = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    made = {
        "good": ours.sign(loopback, -1, 20),
        "expired": ours.sign(loopback, -90, -60),
        "self_signed": another.sign(loopback, -1, 20),
        "wrong_host": ours.sign(x509.DNSName("elsewhere.test"), -1, 20),
        "authority": ours.certificate.public_bytes(serialization.Encoding.PEM),
    }
    paths = {}
    for kind, data in made.items():
        paths[kind] = folder / f"{kind}.pem"
        paths[kind].write_bytes(data)
    return paths
