class WinQ:
    pass
