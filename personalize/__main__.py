from personalize.cli.app import main

main()
