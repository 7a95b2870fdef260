"""Where things are in a hospital's private folder.

It is the hospital's own: nothing in it ever leaves, and nothing that a server sends names a path in it::

    private/
      policy.toml           what the hospital allows
      ledger.sqlite         what was done to its data, for ever
      secret.key            32 bytes, from which all noise is derived, and the key that signs replies
      witness/ledger.json   the newest state of the ledger; better on another disk
      audit.jsonl           what the daemon was asked and what it answered
      debug.log             the text of errors
      trainer.lock          held by the one daemon whose processes work on the data
      daemon-data.lock      held by the daemon that keeps them running; daemon-network.lock is beside the keys
"""

POLICY, LEDGER, SECRET, WITNESS = "policy.toml", "ledger.sqlite", "secret.key", "witness/ledger.json"
SIGNING = "signing.pub"
"""Beside the keys of the network, and public: by which others check what the site signs with its secret."""

JOURNAL, DEBUG_LOG, TRAINER_LOCK = "audit.jsonl", "debug.log", "trainer.lock"
DAEMON_LOCK = "daemon-{part}.lock"
