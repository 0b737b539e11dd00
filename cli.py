from bake.commands import main

main()
