"""One spelling per device, so that "cuda", "cuda:0" and `torch.device(0)` are one key."""

import torch

# Names of exactly one device, whatever the current one is: a string costs two microseconds to parse.
_KNOWN: dict[torch.device | str, torch.device] = {}


def canonical_device(device: torch.device | str | int | None, argument: str = "device") -> torch.device:
    """Turns what torch accepts as a device into a `torch.device` that names exactly one.

    Args:
        device: anything `torch.device` takes; None is torch's default device.
        argument: the name to use in the error.

    Returns:
        `cpu` and `meta` without an index, every other device with one (the current one where none was given).

    Raises:
        TypeError: if `device` is not a device, string, integer or None.
        ValueError: if torch does not know the device.
    """
    if isinstance(device, torch.device | str):
        known = _KNOWN.get(device)
        if known is not None:
            return known
    given = device
    if device is None:
        device = torch.get_default_device()
    elif not isinstance(device, torch.device):
        if isinstance(device, bool) or not isinstance(device, str | int):
            raise TypeError(f"{argument}: expected a torch.device, string or index, got {type(device).__name__}")
        try:
            device = torch.device(device)
        except RuntimeError as error:
            raise ValueError(f"{argument}: expected a device torch knows, got {device!r} ({error})") from None
    if device.type in ("cpu", "meta"):
        device = torch.device(device.type)
    elif device.index is None:
        module = torch.get_device_module(device)
        return torch.device(device.type, module.current_device() if hasattr(module, "current_device") else 0)
    if isinstance(given, torch.device | str):
        _KNOWN[given] = device
    return device
