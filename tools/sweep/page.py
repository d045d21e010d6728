def failed(r): return any(k in r for k in ("refused","crashed","timeout"))
def summary(rs): return str(len(rs))
def coverage(rs, c): return ""
