"""placeholder"""
def verify_capture(program, private, call):
    pass
