class Judge:
    pass
