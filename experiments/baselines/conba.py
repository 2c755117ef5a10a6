"""Pure Conba at the nano size: eight Conba layers and no attention, at nano's parameters within 2 %.

717k tokens take about 5 minutes on one CPU core. The argument names a Conba preset.

    mixcon train --config experiments/baselines/conba.py --workdir runs/conba
"""

import os
import runpy

NANO = runpy.run_path(os.path.join(os.path.dirname(__file__), '../mixcon/nano.py'))


def get_config(arg=None):
    """Returns the configuration; the argument names a Conba preset (``conba``, ``conba_paper``, ``conba_code``)."""
    config = NANO['get_config'](arg)
    config.name = 'conba-nano' + (f'-{arg}' if arg else '')
    config.model.pattern = ('conba+mlp',) * 8
    config.model.mlp.hidden_dim = 147
    return config
