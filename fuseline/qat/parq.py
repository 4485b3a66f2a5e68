class PARQ:
    pass
