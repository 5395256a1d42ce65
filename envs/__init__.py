"""Environments: what an agent acts in. Importing this registers Espalier's environments with Gymnasium."""

from __future__ import annotations

import gymnasium

from .core import (
    Action,
    AgentEnv,
    EnvFailure,
    Message,
    Observation,
    Snapshot,
    Task,
    ToolCall,
    ToolError,
    capabilities,
)

__all__ = [
    "Action",
    "AgentEnv",
    "EnvFailure",
    "Message",
    "Observation",
    "Snapshot",
    "Task",
    "ToolCall",
    "ToolError",
    "capabilities",
]

SPREADSHEET = "espalier/Spreadsheet-v0"
CODE_SANDBOX = "espalier/CodeSandbox-v0"

for _id, _entry in (
    (SPREADSHEET, "espalier.envs.spreadsheet.env:SpreadsheetEnv"),
    (CODE_SANDBOX, "espalier.envs.coding.env:CodeSandboxEnv"),
):
    if _id not in gymnasium.registry:
        # Gymnasium's own checker expects arrays; `check.check_agent_env` is the one for agent environments.
        gymnasium.register(_id, entry_point=_entry, disable_env_checker=True)
