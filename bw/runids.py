import sys, os, pytest
sys.path.insert(0, "/tmp/bw"); sys.path.insert(0, "bw")
import ids
names = list(dict.fromkeys(sum((getattr(ids, n) for n in sys.argv[1].split(",")), [])))
if os.environ.get("REVERSED"): names = names[::-1]
sys.exit(pytest.main(["-p", "no:benchmark", "-p", "no:cacheprovider", "-q", *sys.argv[2:], *(ids.F + n for n in names)]))
