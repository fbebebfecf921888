"""How long OpenMP's threads wait for each other by spinning, before they sleep and leave their core to others."""

import os
from collections.abc import MutableMapping

WAIT = {
    "GOMP_SPINCOUNT": "10000",  # of GNU's OpenMP, which torch's wheels for Linux carry; about 0.1 ms, its own choice is 300000
    "KMP_BLOCKTIME": "1",  # ms; of LLVM's and Intel's, which wheels for macOS and conda's packages carry; their choice is 200
}


def limit_spinning(environment: MutableMapping[str, str] = os.environ) -> None:
    """Sets it where the user has not, by either name or by OMP_WAIT_POLICY; each library reads its own as torch is imported.

    Beside another busy program a thread that spins keeps the one it waits for from its core: a picture of Toyland took 57 to
    79 s beside two training processes, which is 7 s on a quiet machine.
    """
    if "OMP_WAIT_POLICY" not in environment:
        for name, value in WAIT.items():
            environment.setdefault(name, value)
