"""Every process of Airflow loads the plugin, so that loading it must cost nothing."""

from __future__ import annotations

import subprocess
import sys


def test_the_plugin_imports_nothing_but_itself() -> None:
    code = (
        "import sys, airflow.plugins_manager; before = set(sys.modules)\n"
        "import qlora_retrain.runtimes.airflow.ui.plugin as plugin\n"
        "print(sorted(name for name in set(sys.modules) - before if 'qlora_retrain' not in name))\n"
        "print('fastapi' in sys.modules, plugin.ModelPages.name)"
    )
    completed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert completed.stdout.split("\n")[-3:-1] == ["[]", "False qlora_retrain"]
