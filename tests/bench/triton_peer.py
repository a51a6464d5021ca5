"""The real Triton from NVIDIA's `nvidia-pytriton` wheel, in a virtual environment of its own (`make peer`).

The wheel carries the C++ server and its python backend only.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from tests.bench.server_process import Ports, ServerProcess
from tests.bench.workloads import ROOT

HOME = ROOT / "build" / "peer"
PACKAGE = "nvidia-pytriton==0.7.0"


def is_installed() -> bool:
    return (HOME / "installed").exists()


def install() -> None:
    """Makes the environment; minutes and about a gigabyte."""
    import onnxruntime

    HOME.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-m", "venv", HOME / "venv"], check=True)
    packages = (PACKAGE, f"onnxruntime=={onnxruntime.__version__}", "numpy")
    subprocess.run([HOME / "venv" / "bin" / "pip", "install", "--quiet", *packages], check=True)
    _lay_out_backend()
    (HOME / "installed").touch()


def _site() -> Path:
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return HOME / "venv" / "lib" / version / "site-packages"


def _lay_out_backend() -> None:
    """The server expects its stub beside the backend; the wheel has one for each Python."""
    server = _site() / "pytriton" / "tritonserver"
    backend = HOME / "backends" / "python"
    shutil.copytree(server / "backends" / "python", backend, dirs_exist_ok=True)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    shutil.copy(server / "python_backend_stubs" / version / "triton_python_backend_stub", backend)


def process(repository: Path, ports: Ports, log: Path) -> ServerProcess:
    site = _site()
    command = [
        str(site / "pytriton" / "tritonserver" / "bin" / "tritonserver"),
        f"--model-repository={repository}",
        f"--backend-directory={HOME / 'backends'}",
        "--backend-config=python,shm-region-prefix-name=enginehouse_bench",
        "--http-address=127.0.0.1",
        "--grpc-address=127.0.0.1",
        f"--http-port={ports.http}",
        f"--grpc-port={ports.grpc}",
        f"--metrics-port={ports.metrics}",
    ]
    library_folder = sysconfig.get_config_var("LIBDIR")
    environment = {
        "PATH": f"{HOME / 'venv' / 'bin'}:/usr/local/bin:/usr/bin:/bin",
        "PYTHONPATH": str(site),
        "LD_LIBRARY_PATH": f"{site / 'nvidia_pytriton.libs'}:{library_folder}",
    }
    return ServerProcess("triton", command, ports, log, environment)


if __name__ == "__main__":
    if is_installed():
        print(f"{PACKAGE} is installed in {HOME}")
    else:
        install()
