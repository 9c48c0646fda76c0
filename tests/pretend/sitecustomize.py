"""First on PYTHONPATH, this puts every process's models on the pretend card (`pretend_card`).

Python imports it as it starts, when nothing says yet that torch is needed: the card comes with
`lavic_utils.loading`, which says where a model goes."""

import sys
from importlib.machinery import PathFinder

AFTER = "lavic_utils.loading"


class Finder:
    """Finds that one module as ever, and has the card installed once it is there."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != AFTER or not (spec := PathFinder.find_spec(name, path, target)):
            return None
        execute = spec.loader.exec_module

        def then_install(module) -> None:
            execute(module)
            import pretend_card

            pretend_card.install(module)

        spec.loader.exec_module = then_install
        return spec


sys.meta_path.insert(0, Finder)
