"""PTE inside verl: plugin, checks, training engines, rollouts.

verl is imported before anything here. It loads the plugin, whose modules would otherwise be half imported when it asks
for them: the plugin would count as broken.
"""

import verl  # noqa: F401
